"""Small vision encoders, strong without labels: self-supervised distillation (SEED, ICLR 2021) as a suite."""

__version__ = "0.2.0"
