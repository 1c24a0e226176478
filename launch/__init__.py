"""What `deepspeed` starts (installed as lavin_ds.launch)."""
