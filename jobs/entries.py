"""The executors of jobs that come with the project: each of these modules registers one."""

from jobs import local, ray, slurm  # noqa: F401
