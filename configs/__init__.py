"""One file a run; its docstring says the command, the hardware, the time and the result."""
