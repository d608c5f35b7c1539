"""Batch scripts for Slurm, installed as the package `bowstring_slurm`."""
