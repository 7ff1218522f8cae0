"""The doors for Python: the commands as functions, and trained encoders as objects."""
