"""An adaptive solver of ordinary differential equations, for the density of an image; Diffrax, an extra."""

from jaxtyping import PyTree

from warm_jax.data.records import import_package
from warm_jax.diffusion.density import Field, Solve

MOST_STEPS = 4096
_STAGES = 6  # evaluations a step; the seventh is the next step's first


def solver(tolerance: float) -> Solve:
    """Tsitouras' method of order 5 with a PI controller, `tolerance` relative and absolute for a step.

    The state is one system: its steps are those of the hardest image of a batch. Where `MOST_STEPS` do not suffice the
    result is not finite. ValueError, with the extra to install, where Diffrax is not there.
    """
    diffrax = import_package("diffrax", "the metric bpd_ode", "ode")
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, pcoeff=0.4, icoeff=0.3)

    def solve(field: Field, start: float, end: float, state: PyTree) -> tuple[PyTree, PyTree]:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda u, y, _: field(u, y)),
            diffrax.Tsit5(),
            start,
            end,
            None,
            state,
            stepsize_controller=controller,
            max_steps=MOST_STEPS,
            saveat=diffrax.SaveAt(t1=True),
            throw=False,
        )
        return tuple(part[0] for part in found.ys), _STAGES * found.stats["num_steps"]

    return solve
