"""Sharded, asynchronous, committed checkpoints, and snapshots in the memory of the nodes.

checkpointer.py  what the loop calls: when a save is due, and that it counts on all ranks or on none
staging/         from the device to host memory, while training goes on
tiers/           where a snapshot is safe: this node, a peer's memory, a disk of the node
replicas/        the process per node that holds snapshots, and copies between nodes
durable/         to the run's storage, complete or invisible; which are kept
format/          what a checkpoint is as bytes
restore/         from the nearest place that has it, onto any world
hf/              models of Hugging Face, in and out
"""
