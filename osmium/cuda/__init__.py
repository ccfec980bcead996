"""The machine: driver, memory, order.  Importing it loads no CUDA binding."""
