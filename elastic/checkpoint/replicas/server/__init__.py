"""The replica server: one process per node that holds snapshots in host memory while the trainers that made them come
and go.

__main__   the process: its start, its end, and the connections it takes
store      the shards that it holds
trainer    what a trainer of its node may ask for
visitor    what any process with the secret may ask for
incoming   copies that come from other nodes
node_disk  shards on a disk of the node
"""
