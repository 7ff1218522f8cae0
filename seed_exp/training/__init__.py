"""What trains encoders."""
