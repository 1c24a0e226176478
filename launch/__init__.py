"""The scripts that `deepspeed` starts on every rank (installed as lavin_ds.launch)."""
