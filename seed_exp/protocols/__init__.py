"""What measures trained encoders, one file per protocol."""
