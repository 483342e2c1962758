"""Time and its noise: clock, interleaved measurements, tables of layers' latencies, a check of MAC counts."""
