"""CUDA: the driver, memory, streams and graphs.  Importing it loads no CUDA binding."""
