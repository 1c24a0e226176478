"""DeepSpeed configurations, plain JSON a user can read and edit (installed as lavin_ds.ds_configs)."""
