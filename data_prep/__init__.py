"""Jobs that turn source data into Arrow shards (installed as lavin_ds.data_prep)."""
