"""One optimizer step: a pure function of (state, batch), the same for every method."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from csc_jax.methods import LossOutputs, Method
from csc_jax.methods.base import Batch
from csc_jax.models.weights import overlay
from csc_jax.optimizer import learning_rate_schedule
from csc_jax.parallel.sharding import batch_sharding, replicated, state_sharding
from csc_jax.state import Network, TrainState, copy_network
from csc_jax.training.accumulate import accumulated
from csc_jax.training.background import in_background, wait_for

Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
AbstractBatch = dict[str, dict[str, jax.ShapeDtypeStruct]]


def init_state(
    method: Method,
    tx: optax.GradientTransformation,
    seed: Array | int,
    pretrained: dict[str, Any],
) -> TrainState:
    """Returns the state before step 0; student and teacher start equal, in buffers of their own.

    Every network, companions too, takes those arrays of {"params", "batch_stats"} from
    `pretrained` that it has a place for; {} leaves them as drawn.
    """

    def start(network: Network) -> Network:
        variables = overlay(network.variables, pretrained)
        return Network(variables["params"], variables.get("batch_stats", {}))

    student_key, companion_key = jax.random.split(jax.random.key(seed))
    student = start(method.task.init_network(student_key, projection=method.projection))
    companions = {k: start(n) for k, n in method.init_companions(companion_key).items()}
    trained = {"student": student.params} | {k: n.params for k, n in companions.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
        student=student,
        teacher=copy_network(student),
        companions=companions,
        bank=method.init_bank(),
        method_state=method.init_method_state(),
        opt_state=tx.init(method.trainable(trained)),
    )


def train_step(
    method: Method,
    tx: optax.GradientTransformation,
    seed: Array | int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Returns the next state and metrics, each () float32.

    Every random choice is a function of (seed, state.step), so a resumed run repeats it.
    Where the loss or a gradient is not finite, nothing is learnt from the batch: all but `step` and
    `rejected` stays bit for bit as it was.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss_key, update_key = jax.random.split(key)
    trainable = method.trainable(state.trained)

    def loss_of(
        trainable: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        return method.loss(_with(state.trained, trainable), state, batch, key)

    grad = jax.value_and_grad(loss_of, has_aux=True)
    parts = method.task.config.train.accumulate
    if parts > 1:
        (loss, outputs), gradients = accumulated(grad, parts, trainable, state, batch, loss_key)
    else:
        (loss, outputs), gradients = grad(trainable, state, batch, loss_key)
    norm = optax.tree.norm(gradients)  # not finite if any gradient is not

    @jax.jit  # so that `eval_shape` below and `cond` share one trace
    def learn(state: TrainState) -> tuple[TrainState, Metrics]:
        trainable = method.trainable(state.trained)
        updates, opt_state = tx.update(gradients, state.opt_state, trainable)
        params = _with(state.trained, optax.apply_updates(trainable, updates))
        new_state = state.with_trained(params, outputs.batch_stats).replace(opt_state=opt_state)
        new_state, update_metrics = method.update(new_state, outputs, update_key)
        return new_state.replace(rejected=jnp.zeros_like(state.rejected)), update_metrics

    def reject(state: TrainState) -> tuple[TrainState, Metrics]:
        not_defined = jax.tree.map(
            lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(learn, state)[1]
        )
        return state.replace(rejected=state.rejected + 1), not_defined

    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new_state, update_metrics = jax.lax.cond(finite, learn, reject, state)
    schedule = learning_rate_schedule(method.task.config.optimizer, method.task.total_steps)
    metrics = {"loss": loss, "learning_rate": schedule(state.step), "gradient_norm": norm}
    metrics["rejected"] = new_state.rejected.astype(jnp.float32)
    metrics |= outputs.metrics | update_metrics
    return new_state.replace(step=state.step + 1), metrics


def _with(params: dict[str, Any], trainable: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters of networks with those parts of them that `Method.trainable` gave."""
    return {name: {**params[name], **part} for name, part in trainable.items()}


def compile_init(
    method: Method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    pretrained: dict[str, Any] | None = None,
) -> Callable[[], TrainState]:
    """Returns the jitted `init_state`: one program, so that no two leaves share a buffer."""
    arrays = pretrained or {}

    def init(seed: Array, arrays: dict[str, Any]) -> TrainState:
        return init_state(method, tx, seed, arrays)

    # The arrays are an argument, as they would be constants of the program otherwise.
    seed = _seed(method)
    places = state_sharding(jax.eval_shape(init, seed, arrays), mesh)
    return partial(jax.jit(init, out_shardings=places), seed, arrays)


def abstract_state(method: Method, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state's shapes and shardings."""
    state = jax.eval_shape(compile_init(method, tx, mesh))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        state_sharding(state, mesh),
    )


def compile_step(
    method: Method, tx: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> Step:
    """Returns the jitted step: batch split over the mesh, state as `state` has it, donated.

    It is a `partial`: the seed is its first argument, given already, so that runs which differ by
    it alone find each other's program in the compilation cache.

    Args:
      method: what is trained, and how.
      tx: the optimizer of all its networks.
      mesh: devices to compile for.
      state: shardings, as of `abstract_state`, or a state itself.
    """

    def on_mesh(seed: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # In force while the step is traced: what splits its work asks for the mesh, and what is
        # made for one kind of device asks which.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(method, tx, seed, state, batch)

    places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        on_mesh,
        in_shardings=(replicated(mesh), places, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=1,
    )
    return partial(step, _seed(method))


def lower_step(step: Step, state: TrainState, batch: AbstractBatch) -> jax.stages.Lowered:
    """Returns the traced program of a step of `compile_step`, not compiled.

    Args:
      step: of `compile_step`.
      state: shapes and shardings, as of `abstract_state`.
      batch: shapes of the whole batch, as of `data.abstract_batch`.
    """
    jitted = cast(partial[Any], step)
    return cast(jax.stages.Wrapped, jitted.func).lower(*jitted.args, state, batch)


def compile_ahead(step: Step, state: TrainState, batch: AbstractBatch) -> Step:
    """Returns the same step, compiled in a thread while the caller goes on.

    It is traced before this returns: that is Python's work, as the caller's own will be. The
    compiler, or the reading of its cache, is not, and the first step waits for it, telling so.

    Args:
      step: as in `lower_step`.
      state: as in `lower_step`.
      batch: as in `lower_step`. Other shapes are a TypeError later.
    """
    lowered, given = lower_step(step, state, batch), cast(partial[Any], step).args
    since, program = time.perf_counter(), in_background(lowered.compile)

    def compiled_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return wait_for(program, "compiling the train step", since)(*given, state, batch)

    return compiled_step


def _seed(method: Method) -> np.ndarray:
    return np.asarray(method.task.config.seed, np.uint32)
