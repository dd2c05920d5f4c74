"""Completion of `csc-jax` in bash: commands, flags, fields, configs; files elsewhere."""

from collections.abc import Iterable

# A "=" begins a new word in bash, the one before the cursor, $2: what stands in front of it tells
# what it is. A flag that takes a value gets no blank behind it.
_SCRIPT = """\
_csc_jax() {{
    local words= typed="${{COMP_LINE:0:COMP_POINT}}"
    case "${{typed##* }}" in
        --config=*) words="{configs}" ;;
        -*=*) ;;
        -*) words="{flags}" ;;
        *) [ "$COMP_CWORD" = 1 ] && words="{commands}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{2#=}}"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace ;; esac
}}
complete -o default -F _csc_jax csc-jax"""


def script(
    commands: Iterable[str], flags: Iterable[str], fields: Iterable[str], configs: Iterable[str]
) -> str:
    """Returns what bash evaluates: `eval "$(csc-jax --completion)"`.

    Args:
      commands: that come first, such as `train`.
      flags: with two dashes; one that takes a value ends in "=".
      fields: of the config, such as `train.steps`.
      configs: names that `--config` takes.
    """
    return _SCRIPT.format(
        commands=" ".join(commands),
        flags=" ".join([*flags, *(f"--config.{field}=" for field in fields)]),
        configs=" ".join(configs),
    )
