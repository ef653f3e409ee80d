"""Names of what a storage keeps beside parameters and values."""

# of a study
DEFINITION = "definition"

# of a trial, while it waits and runs
POINT = "point"
SEED = "seed"
OWNER = "owner"
HEARTBEAT = "heartbeat"

# of a trial that ended without a result
TRACEBACK = "traceback"  # it failed
GIVEN_UP = "given_up"  # it was interrupted or superfluous; its point does not count as trained
LOST = "lost"  # it was given up because its process had ended

# of a result
COMMAND = "command"
METRICS = "metrics"
ACCURACY = "accuracy_by_position"
PREFIX_COUNTS = "prefix_counts"
STEPS = "steps"
TOKENS = "tokens"
SECONDS = "seconds"
TRAINING_SECONDS = "training_seconds"
LOG_DIR = "log_dir"
