"""task=trace: what matching finds in the queries of real decoding, computed exactly, after the fact, from one text of full attention."""
