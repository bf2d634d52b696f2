"""`python -m warm_jax`: the same as `python -m warm_jax.main`."""

from warm_jax.runtime import preemption

if __name__ == "__main__":
    preemption.listen()  # before the import below, which takes seconds

from warm_jax import main

if __name__ == "__main__":
    main.run()
