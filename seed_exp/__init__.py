"""Self-supervised distillation (SEED, ICLR 2021) as a suite: strong small vision encoders."""

__version__ = "0.2.0"
