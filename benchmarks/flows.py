"""What learned flows are worth: effective sample size at every size, and what an error bar costs with and without.

python benchmarks/flows.py transfer --checkpoint runs/mw mw_cubic_64 mw_cubic_216 mw_cubic_512
python benchmarks/flows.py cost --checkpoint runs/mw --target-error 1e-4 mw_cubic_64
python benchmarks/flows.py bar --checkpoint runs/lj --frames traj.extxyz.gz lj_fcc_256
python benchmarks/flows.py steps --architecture atomic_solids --batch-size 128 mw_cubic_8
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import freeflow as ff
from freeflow import checkpoints, preparation, training, trajectories
from freeflow.estimators import bar, effective_sample_size
from freeflow.estimators.timeseries import statistical_inefficiency
from freeflow.flows import pulled_back
from freeflow.types import FlowPlan, TrainingPlan, Work, double_precision


def one_shot_work(system, flow, params, n_samples, batch=64, seed=1):
    """Forward work of fresh samples [kT], in float64 against the exact target."""
    target = pulled_back(flow, params, system.target)

    def one(key):
        z = flow.recipe.launch(key, "float64")
        u = flow.recipe.colour(flow.gaussian, z)
        return target.reduced_potential(u, system.state) - 0.5 * jnp.sum(z * z)

    work = jax.jit(jax.vmap(one))
    keys = jax.random.split(jax.random.key(seed), (-(-n_samples // batch), batch))
    return np.concatenate([np.asarray(work(some)) for some in keys])[:n_samples]


def loaded(system, checkpoint):
    return checkpoints.load_flow(
        system, checkpoint, lambda: preparation.fit_gaussian(system, system.plan, lambda _: None).gaussian
    )


def transfer(arguments):
    print(f"{'system':<20}{'atoms':>6}{'ESS':>9}{'ln(1/ESS)/N':>14}{'var(w)/N':>11}{'beta F/N':>13}{'samples':>9}")
    for name in arguments.systems:
        system = ff.load(name)
        with double_precision():
            flow, params = loaded(system, arguments.checkpoint)
            w = one_shot_work(system, flow, params, arguments.samples)
            log_z = float(flow.recipe.ensemble(flow.gaussian).log_partition(system.state))
        ess = effective_sample_size(-w) / len(w)
        beta_f = -system.log_prefactor - log_z - np.log(np.mean(np.exp(-(w - w.min())))) + w.min()
        n = system.n_atoms
        print(
            f"{name:<20}{n:>6}{ess:>9.3f}{-np.log(ess) / n:>14.5f}{w[np.isfinite(w)].var() / n:>11.5f}"
            f"{beta_f / n:>13.5f}{len(w):>9}",
            flush=True,
        )


def cost(arguments):
    print(f"{'system':<16}{'way':<20}{'beta F/N':>12}{'error':>9}{'evaluations':>13}{'wall s':>8}  status")
    for name in arguments.systems:
        flow = FlowPlan(checkpoint=arguments.checkpoint)
        ways = {"bridge": {"flow": None}, "flow": {"flow": flow, "bridge": None}, "flow and bridge": {"flow": flow}}
        if arguments.stages:
            ways["flow and bridge"]["bridge"] = arguments.stages
        for way, changes in ways.items():
            system = ff.load(name)
            begin = time.perf_counter()
            result = ff.estimate(system, target_error=arguments.target_error, max_samples=arguments.samples, **changes)
            print(
                f"{name:<16}{way:<20}{result.beta_f_per_atom:>12.5f}{result.beta_f_per_atom_std_error:>9.1e}"
                f"{sum(result.energy_evaluations.values()):>13}{time.perf_counter() - begin:>8.1f}  {result.status}",
                flush=True,
            )


def bar_with_frames(arguments):
    """BAR from flow samples and MD frames, their statistical inefficiency in the error bar."""
    name = arguments.systems[0]
    system = ff.load(name)
    positions = np.concatenate([frames.positions for frames in trajectories.read(arguments.frames, system)])
    u = trajectories.to_displacements(positions, system.crystal).displacements
    with double_precision():
        flow, params = loaded(system, arguments.checkpoint)
        forward = one_shot_work(system, flow, params, arguments.samples)
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), params)

        def back(u):
            x, log_det = flow.bijector.inverse(cast, flow.coordinates(u), system.state)
            z = flow.recipe.whiten(flow.gaussian, x)
            return 0.5 * jnp.sum(z * z) - system.target.reduced_potential(u, system.state) - log_det

        reverse = np.concatenate(
            [np.asarray(jax.jit(jax.vmap(back))(part)) for part in np.array_split(u, len(u) // 50)]
        )
        inefficiency = statistical_inefficiency(reverse)
        answer = bar(Work(forward, reverse), inefficiency=(1.0, inefficiency))
        log_z = float(flow.recipe.ensemble(flow.gaussian).log_partition(system.state))
    n = system.n_atoms
    beta_f = (-system.log_prefactor - log_z + float(answer.delta_f)) / n
    print(
        f"{name}: BAR of {len(forward)} flow samples and {len(reverse)} frames (inefficiency {inefficiency:.2f}): ",
        end="",
    )
    print(f"beta F/N = {beta_f:.5f} +- {float(answer.std_error) / n:.1e}; published {system.published}")


def steps(arguments):
    for name in arguments.systems:
        system = ff.load(name)
        with double_precision():
            gaussian = preparation.fit_gaussian(system, system.plan, lambda _: None).gaussian
            flow = checkpoints.build_flow(system, arguments.architecture, {}, functools.partial(lambda g: g, gaussian))
            plan = TrainingPlan(batch_size=arguments.batch_size, max_steps=10_000, loss=arguments.loss)
            made = training.trainer(flow, system.state, plan, 0)
            begin = time.perf_counter()
            compiled = training.compile_trainer(made)
            compile_seconds = time.perf_counter() - begin
            state = jax.block_until_ready(jax.jit(made.init)())
            state = state._replace(horizon=jnp.asarray(10_000, "int32"))
            state = compiled.advance(state, 2)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < arguments.seconds:
                state = compiled.advance(state, 5)
                count += 5
            seconds = (time.perf_counter() - begin) / count
            print(
                f"{name} {arguments.architecture} {arguments.loss}: {1 / seconds:.2f} steps/s "
                f"of {arguments.batch_size} samples, compiled in {compile_seconds:.1f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["transfer", "cost", "bar", "steps"])
    parser.add_argument("systems", nargs="+")
    parser.add_argument("--checkpoint", default="shipped")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--target-error", type=float, default=1e-4)
    parser.add_argument("--stages", type=int, default=None, help="of the bridge after the flow (default: automatic)")
    parser.add_argument("--frames")
    parser.add_argument("--architecture", default="residual")
    parser.add_argument("--loss", default="path_gradient")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    jobs = {"transfer": transfer, "cost": cost, "bar": bar_with_frames, "steps": steps}
    defaults = {"transfer": 8192, "cost": 1_000_000, "bar": 2048, "steps": 0}
    arguments.samples = arguments.samples or defaults[arguments.what]
    jobs[arguments.what](arguments)


if __name__ == "__main__":
    main()
