"""The work of the commands that neither train nor measure accuracy."""
