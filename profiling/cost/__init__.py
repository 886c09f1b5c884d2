"""Predict what a step costs without running it: FLOPs, bytes moved and sent, peak memory.

flops.py            formulas of every layer             step_flops.py       a step's layers and tokens
operator_trace.py   bytes of operators as they run      step_trace.py       a step on tensors without memory
block_traffic.py    bytes of a block, eager, compiled
roofline.py         FLOPs and bytes of each phase       peak_memory.py      states, peak, settings that lower it
communication.py    collectives between ranks           zero3_gathers.py    parameters that ZeRO-3 gathers
"""
