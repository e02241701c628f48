"""What every training run of the command line shares: the trainer, checkpoints, stopping, reports."""
