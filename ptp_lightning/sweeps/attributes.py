"""Names of the user attributes that a study and its trials have in an Optuna storage."""

# Of a study.
DEFINITION = "definition"

# Of a trial that waits or runs.
POINT = "point"
SEED = "seed"
OWNER = "owner"
HEARTBEAT = "heartbeat"
HEARTBEAT_STEP = "heartbeat_step"
START_STEP = "start_step"  # with which its training begins, after the checkpoint of an earlier one

# Of a trial that ended without a result.
TRACEBACK = "traceback"  # of the exception
GIVEN_UP = "given_up"  # why it was abandoned; its point counts as untrained
LOST = "lost"  # abandoned because its process had died

# Of a result.
COMMAND = "command"
METRICS = "metrics"
ACCURACY = "accuracy_by_position"
PREFIX_COUNTS = "prefix_counts"
STEPS = "steps"
TOKENS = "tokens"
SECONDS = "seconds"
TRAINING_SECONDS = "training_seconds"
CPU_SECONDS = "cpu_seconds"
SHARED_STEPS = "shared_steps"  # the first steps, which are those of every longer training
VERSION = "version"  # of this package, with the commit of a checkout
LOG_DIR = "log_dir"
