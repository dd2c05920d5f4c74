"""One optimizer step: a pure function of (state, batch), the same for every method."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from csc_jax.methods import Method
from csc_jax.methods.base import Batch
from csc_jax.models.weights import overlay
from csc_jax.optimizer import learning_rate_schedule
from csc_jax.sharding import batch_sharding, replicated
from csc_jax.state import Network, TrainState, copy_network

Metrics = dict[str, Array]


def init_state(
    method: Method, tx: optax.GradientTransformation, seed: int, pretrained: dict[str, Any]
) -> TrainState:
    """Returns the state before step 0; student and teacher start equal, in buffers of their own.

    Every network, companions too, takes those arrays of {"params", "batch_stats"} from
    `pretrained` that it has a place for; {} leaves them as drawn.
    """

    def start(network: Network) -> Network:
        variables = overlay(network.variables, pretrained)
        return Network(variables["params"], variables["batch_stats"])

    student_key, companion_key = jax.random.split(jax.random.key(seed))
    student = start(method.task.init_network(student_key, projection=method.projection))
    companions = {k: start(n) for k, n in method.init_companions(companion_key).items()}
    trained = {"student": student.params} | {k: n.params for k, n in companions.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=copy_network(student),
        companions=companions,
        bank=method.init_bank(),
        method_state=method.init_method_state(),
        opt_state=tx.init(trained),
    )


def train_step(
    method: Method, tx: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Returns the next state and metrics, each () float32.

    Every random choice is a function of (config.seed, state.step), so a resumed run repeats it.
    """
    key = jax.random.fold_in(jax.random.key(method.task.config.seed), state.step)
    loss_key, update_key = jax.random.split(key)
    grad = jax.value_and_grad(method.loss, has_aux=True)
    (loss, outputs), gradients = grad(state.trained, state, batch, loss_key)
    updates, opt_state = tx.update(gradients, state.opt_state, state.trained)
    params = optax.apply_updates(state.trained, updates)
    new_state = state.with_trained(params, outputs.batch_stats).replace(opt_state=opt_state)
    new_state, update_metrics = method.update(new_state, outputs, update_key)
    schedule = learning_rate_schedule(method.task.config.optimizer, method.task.total_steps)
    metrics = {"loss": loss, "learning_rate": schedule(state.step)}
    metrics |= outputs.metrics | update_metrics
    return new_state.replace(step=state.step + 1), metrics


def compile_init(
    method: Method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    pretrained: dict[str, Any] | None = None,
) -> Callable[[], TrainState]:
    """Returns the jitted `init_state`: one program, so that no two leaves share a buffer."""
    init = jax.jit(
        lambda arrays: init_state(method, tx, method.task.config.seed, arrays),
        out_shardings=replicated(mesh),
    )
    return partial(init, pretrained or {})


def compile_step(
    method: Method, tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step: batch split along "data", state replicated and donated."""
    everywhere = replicated(mesh)
    return jax.jit(
        lambda state, batch: train_step(method, tx, state, batch),
        in_shardings=(everywhere, batch_sharding(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )
