"""The parts of the scheduler `slurm`: the script of a job, and what a cluster says about jobs."""
