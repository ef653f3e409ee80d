"""What `srun` tells the tasks of a job on one node."""

from __future__ import annotations


def task_environment(rank: int, num_tasks: int, port: int) -> dict[str, str]:
    """Variables of one task.

    Args:
        rank: of the task.
        num_tasks: of the job.
        port: at which the tasks meet.
    """
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "ptp", "SLURM_NTASKS": str(num_tasks)}
    job |= {"SLURM_NTASKS_PER_NODE": str(num_tasks), "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    return job | {"MASTER_PORT": str(port), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
