"""The settings of --mode=analyze, the same for every data set."""

from ml_collections import ConfigDict


def defaults(samples: int) -> ConfigDict:
    """What the figures are made of. The workdir's checkpoint joins in where there is one.

    `samples`: of a model, for one score of a sweep.
    """
    analysis = ConfigDict()
    analysis.bnrs = (0.0, 0.5, 1.0, 2.0, 10.0)  # blur-to-noise ratios that are compared; the paper's
    analysis.budget = 0.05  # share of the information left by noise that the recommended BNR may cost
    analysis.images = 10_000  # spectra, learning: so many images are measured, spread over the set
    analysis.image = 0  # corruption: number of the image
    analysis.systems = ()  # process: systems to show beside the config's own, as :NAME
    analysis.models = ()  # workdirs of trained models, one a BNR, or an amortised one; empty: the run's own
    analysis.oracle_images = 1_000  # manifold, sweep: images that the empirical oracle knows
    analysis.steps = (9, 18, 40)  # manifold: of Heun's solver, 17, 35 and 79 evaluations
    analysis.sweep_steps = (5, 9, 18, 40)  # sweep: 9, 17, 35 and 79 evaluations
    analysis.solver_bnrs = (0.0, 0.5, 2.0)  # solvers: ratios; of a model those that are among `bnrs` too
    analysis.solver_nfe = (5, 9, 13, 17)  # solvers: budgets of evaluations
    analysis.held_out = ""  # memorisation: images that were not trained on, the control; empty: none
    analysis.guidance_weights = (1.0, 1.5, 2.0, 3.0)  # guidance: weights that are compared; 1 is none
    analysis.guidance_intervals = ((), (0.2, 5.0))  # guidance: noise levels σ_lo, σ_hi; (): all
    analysis.samples = samples  # sweep, solvers, guidance: of a model, a seed; memorisation
    analysis.count = 32  # manifold, solvers: states of an oracle, a seed
    analysis.repeats = 5  # manifold, sweep, solvers, guidance: seeds, for confidence intervals
    return analysis
