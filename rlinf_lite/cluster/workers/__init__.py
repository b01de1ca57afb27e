"""The workers of a run: for each kind a typed class that the driver calls, and the remote class that does the work.

`PolicyWorkers`, `RolloutWorkers` and `RewardWorkers` are the driver's side; `PolicyWorker`, `RolloutWorker` and
`RewardWorker` run in their own processes, each hosted by a `WorkerHost`. Only this package and `WorkerGroup` call
remote methods by name.
"""
