"""What measures the engine and the service. Ratios come from one run, interleaved; every table names its images."""
