"""DeepSpeed configurations: plain JSON that users can read and edit. Installed as lavin_ds.ds_configs."""
