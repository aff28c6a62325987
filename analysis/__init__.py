"""From records to figures and tables. Reads parquet only; knows nothing of how a run was made."""
