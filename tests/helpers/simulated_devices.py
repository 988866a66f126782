"""The files of tests that need several devices, which test_several_devices.py simulates."""

NEED_DEVICES = {
    "step/four_devices.py": 4,
    "step/sharded_steps.py": 8,
    "optim/sharded_state.py": 8,
    "models/batch_norm_shares.py": 8,
    "sharding/eight_devices.py": 8,
    "sharding/runs_on_devices.py": 8,
    "sharding/tensor_parallel.py": 8,
    "testing/two_devices.py": 2,
}
