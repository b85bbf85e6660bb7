"""The processes of a run on a Ray cluster, and what they say to each other.

driver.py     the process that waits for the run: starts the coordinator and Ray Train, and again where they are lost
coordinator/  one actor: decides who trains, keeps the run records
ray/          all that imports ray: its private API, nodes, tokens, the agents
node/         the host, one process per node that outlives Ray's workers
trainers/     what the host forks: one process per slot that runs `elastic.training.run`
jobs/         a run as jobs of a cluster: packed, submitted, followed, tried again
messages.py   every message between these processes
"""
