"""What a checkpoint is worth: evaluations of folders that `transformers` loads, of our models and anybody's."""
