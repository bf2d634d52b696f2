"""The settings of --mode=sample, the same for every data set."""

from ml_collections import ConfigDict, config_dict


def defaults(steps: int, batch_size: int) -> ConfigDict:
    """How samples are drawn; 18 steps of Heun's solver are 35 evaluations of the network."""
    sample = ConfigDict()
    sample.solver = "heun"  # or euler, multistep, multistep3, stochastic, ancestral: docs/solvers.md
    sample.steps = steps
    sample.beta_min = config_dict.placeholder(float)  # lowest noise level of the grid; unset: process.beta_min
    sample.rho = config_dict.placeholder(float)  # of the grid; unset: process.rho
    sample.levels = config_dict.placeholder(str)  # the system's own grid; "edm", or "information": equal in each step
    sample.batch_size = batch_size  # images at a time
    sample.bnr = config_dict.placeholder(float)  # unset: as trained; an amortised model can be sampled at any
    sample.schedule = config_dict.placeholder(str)  # of an amortised model: "constant" or "information_budget"
    sample.class_label = config_dict.placeholder(int)  # unset: each seed draws its own
    sample.guidance = 1.0  # weight of guidance, by the same model told no class or by sample.guide; 1: none
    sample.guidance_interval = ()  # noise levels σ_lo, σ_hi between which it guides, as (0.2, 5); (): at all
    sample.guide = ""  # workdir of a weaker model that guides this one
    sample.guide_checkpoint = -1  # the step of its checkpoint; -1: the latest
    sample.clip = False  # bring x̂0 into [-1, 1] at each step
    sample.S_churn = 0.0  # noise that solver "stochastic" adds, EDM's names
    sample.S_min = 0.0
    sample.S_max = 1e6
    sample.S_noise = 1.0
    sample.delta = 1.25  # noise that solver "perturb" adds, in units of the process's
    return sample
