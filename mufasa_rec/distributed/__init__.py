"""Processes, devices and the placement of tables on them."""
