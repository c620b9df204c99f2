"""From footage to checkpoints, and from a checkpoint to a served model repository."""
