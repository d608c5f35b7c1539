"""Hydra configuration files, installed as the package `bowstring_configs`."""
