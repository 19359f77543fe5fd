# SPDX-License-Identifier: Apache-2.0
"""STATE and ERR gone wrong."""

from tests.mutants import Mutant

DEEP_COPY = """    def __deepcopy__(self, memo: dict[int, Any]) -> "Muon":
        from copy import copy, deepcopy

        twin = copy(self)
        twin.param_groups = deepcopy(self.param_groups, memo)
        twin.state = type(self.state)(dict, {deepcopy(p, memo): state for p, state in self.state.items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
"""

MUTANTS = (
    # What is kept.
    Mutant(
        name="state only for parameters that have a gradient",
        path="impl/muon.py",
        old="if not self.state.get(p) and (p.requires_grad or p.grad is not None):",
        new="if not self.state.get(p) and p.grad is not None:",
        source="torch.optim.Muon makes state when a gradient comes; dion and xtuner make it first, for checkpoints' sake",
        clauses=("STATE-1", "STATE-2", "STATE-5"),
    ),
    Mutant(
        name="state for parameters that are frozen",
        path="impl/muon.py",
        old="if not self.state.get(p) and (p.requires_grad or p.grad is not None):",
        new="if not self.state.get(p):",
        source="ours: memory for a frozen model, and a checkpoint that an optimizer without it refuses",
        clauses=("STATE-1",),
    ),
    Mutant(
        name="state made before gradients are looked at",
        path="impl/muon.py",
        old="        ready = self._ready()\n",
        new="        self._init_state()\n        ready = self._ready()\n",
        source="ours: a step that is refused, or has nothing to do, leaves state behind",
        clauses=("STATE-1", "ERR-3"),
    ),
    Mutant(
        name="AdamW's steps counted in the weight's dtype",
        path="impl/state.py",
        old="return torch.Size(), torch.float32, p.device",
        new="return torch.Size(), p.dtype, p.device",
        source="ours: in bfloat16 the count ends at 256, and the bias correction with it",
        clauses=("STATE-1",),
    ),
    Mutant(
        name="AdamW decays without the learning rate",
        path="impl/stages.py",
        old='W = part["W"] * (1 - lr * number(group["weight_decay"]))',
        new='W = part["W"] * (1 - group["weight_decay"])',
        source="Emerging-Optimizers, independent decay: the step with lr=0 by which torch's distributed checkpointing creates "
        "state changes the weights",
        clauses=("STATE-6", "STEP-8"),
    ),
    # What is saved.
    Mutant(
        name="a late group missing from the state dict",
        path="impl/muon.py",
        old="        if any(self.state.values()):\n            self._init_state()\n",
        new="",
        source="torch: an entry that is missing is silently accepted, and momentum begins anew; ours would not load it",
        clauses=("STATE-1", "STATE-2"),
    ),
    Mutant(
        name="a class of ours in the state dict",
        path="impl/state.py",
        old="return _plain(asdict(value))",
        new="return value",
        source="NovaSky-AI/SkyRL#1403: an optimizer's classes in param_groups break torch.load(weights_only=True)",
        clauses=("STATE-2", "STATE-3"),
    ),
    Mutant(
        name="a NumPy number in the state dict",
        path="impl/state.py",
        old="return int(value) if isinstance(value, Integral) else float(value)",
        new="return value",
        source="ours: a learning rate that a scheduler made with NumPy breaks torch.load(weights_only=True)",
        clauses=("STATE-3",),
    ),
    # What is loaded.
    Mutant(
        name="momentum cast to the weight's dtype on load",
        path="impl/state.py",
        old="torch.as_tensor(value).detach()",
        new="torch.as_tensor(optimizer.state[p][key]).detach()",
        source="torch's Optimizer.load_state_dict; deepspeedai/DeepSpeed#7746, #8433: float32 momentum comes back as bfloat16",
        clauses=("STATE-2", "STATE-3"),
    ),
    Mutant(
        name="momentum zeroed on load",
        path="impl/state.py",
        old="            _, dtype, device = form(group, key, p)\n            optimizer.state[p][key] = torch",
        new="            _, dtype, device = form(group, key, p)\n            value = new_state(group, p)[key]\n"
        "            optimizer.state[p][key] = torch",
        source="NVIDIA/Megatron-LM#2625, #6920: a run goes on from a checkpoint as another one, and nothing says so",
        clauses=("STATE-2", "STATE-3", "STATE-5", "VAR-5"),
    ),
    Mutant(
        name="AdamW's count of steps begins anew on load",
        path="impl/state.py",
        old="optimizer.state[p][key] = torch.as_tensor(value)",
        new='optimizer.state[p][key] = torch.as_tensor(0.0 if key == "step" else value)',
        source="ours: torch's own loading treats `step` apart from all other state",
        clauses=("STATE-2", "STATE-3", "STATE-5"),
    ),
    Mutant(
        name="a state key permuted on load",
        path="impl/state.py",
        old='ids = (i for group in saved["param_groups"] for i in group["params"])\n',
        new='ids = (i for group in saved["param_groups"] for i in reversed(group["params"]))\n',
        source="torch loads by position whatever the names; NVIDIA/Megatron-LM#5060: groups mixed up on load",
        clauses=("STATE-2", "STATE-3"),
    ),
    Mutant(
        name="options of a state dict not loaded",
        path="impl/state.py",
        old="groups = [{**mine, **group} for mine",
        new="groups = [{**group, **mine} for mine",
        source="deepspeedai/DeepSpeed#7713: one learning rate written into all groups",
        clauses=("STATE-2", "STATE-4"),
    ),
    Mutant(
        name="a loaded state shares its memory with the state dict",
        path="impl/state.py",
        old=".to(device, dtype, copy=True)",
        new=".to(device, dtype)",
        source="ours: two optimizers loaded from one dict average into one momentum",
        clauses=("STATE-2",),
    ),
    # What is not loaded.
    Mutant(
        name="a state dict checked after it has been loaded",
        path="impl/muon.py",
        old="""            checked.update(whole(self, saved))
            return checked

        # After the hooks of others that may rewrite what is loaded, before those that may look at it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: restore(self, checked), prepend=True)
""",
        new="""            checked.update(saved)
            return checked

        # After the hooks of others that may rewrite what is loaded, before those that may look at it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: restore(self, whole(self, checked)), prepend=True)
""",
        source="ours: who catches the error goes on with half of a broken checkpoint",
        clauses=("STATE-4", "VAR-5"),
    ),
    Mutant(
        name="names of a state dict not compared",
        path="impl/state.py",
        old="if theirs and mine and theirs != mine:",
        new="if theirs and mine and sorted(theirs) != sorted(mine):",
        source="torch: a named state dict loads into a permuted optimizer without a word; NVIDIA/Megatron-LM#4705",
        clauses=("STATE-4",),
    ),
    Mutant(
        name="entries that nobody knows loaded too",
        path="impl/state.py",
        old="if set(entry) != set(expected):",
        new="if not set(entry) >= set(expected):",
        source="torch: extra entries are silently accepted",
        clauses=("STATE-4",),
    ),
    Mutant(
        name="a momentum that is not finite loaded",
        path="impl/state.py",
        old="if not bool(value.isfinite().all()) or (key in SQUARES",
        new="if (key in SQUARES",
        source="deepspeedai/DeepSpeed#8432: a poisoned momentum, saved and loaded, and the run never recovers",
        clauses=("STATE-4", "VAR-5"),
    ),
    Mutant(
        name="a whole momentum loaded as a rank's part",
        path="impl/state.py",
        old="    if found != right:\n",
        new="    if found is not None and right is None:\n",
        source="ours: of a DTensor's momentum only the whole shape was compared, so each rank took its first rows",
        clauses=("STATE-4", "DIST-1"),
    ),
    Mutant(
        name="a message that does not name the parameter",
        path="impl/state.py",
        old='where = f"state {key!r} of parameter {name}"',
        new='where = f"state {key!r} of a parameter"',
        source="ours: one of a thousand tensors has the wrong shape, and nobody knows which",
        clauses=("STATE-4", "VAR-5"),
    ),
    # What is copied.
    Mutant(
        name="a deep copy that shares state",
        path="impl/muon.py",
        old="    def __getstate__(self) -> dict[str, Any]:\n",
        new=DEEP_COPY,
        source="ours: process groups cannot be copied, so somebody copies the optimizer by hand, and both average into one "
        "momentum",
        clauses=("STATE-5",),
    ),
    Mutant(
        name="a deep copy that shares the counters",
        path="impl/skip.py",
        old="twin.tally = deepcopy(self.tally, memo)",
        new="twin.tally = self.tally",
        source="ours: process groups cannot be copied, so the guard is copied by hand",
        clauses=("STATE-5",),
    ),
    Mutant(
        name="a deep copy that forgets its guard",
        path="impl/muon.py",
        old='return {**super().__getstate__(), "guard": self.guard}',
        new='return {**super().__getstate__(), "guard": Guard(True, None, None, None)}',
        source="torch's Optimizer.__getstate__ keeps defaults, state and groups only; NVIDIA/Megatron-LM#5395: a wrapper loses "
        "its member's flags",
        clauses=("STATE-5", "SKIP-5"),
        seed="nonfinite",
    ),
    # What is refused.
    Mutant(
        name="NaN for an option",
        path="impl/options.py",
        old="if not number or not 0.0 <= float(value) < math.inf:",
        new="if not number or float(value) < 0.0 or float(value) == math.inf:",
        source="microsoft/dion refuses lr < 0 and so accepts a NaN",
        clauses=("ERR-1", "ERR-2"),
    ),
    Mutant(
        name="a message that does not name the option",
        path="impl/options.py",
        old='raise ValueError(f"{label} should be >= 0 but is: {value}")',
        new='raise ValueError(f"a number should be >= 0 but is: {value}")',
        source="ours: the checks of six options in one loop",
        clauses=("ERR-1", "ERR-2", "ERR-4"),
    ),
    Mutant(
        name="another beginning than torch's messages",
        path="impl/options.py",
        old='f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()} ({name}). Put it in "',
        new='f"parameter {name}: Muon only supports 2D parameters whereas we found one with size: {p.size()}. Put it in "',
        source="ours: who tells torch.optim.Muon's errors apart by their text no longer can",
        clauses=("ERR-4",),
    ),
    Mutant(
        name="add_param_group unchecked",
        path="impl/muon.py",
        old="            check_options(group)\n            check_parameters(group",
        new="            check_parameters(group",
        source="torch.optim.Muon checks the options of a group that is added in the first step, if at all",
        clauses=("ERR-2",),
    ),
    Mutant(
        name="a refused group that stays",
        path="impl/muon.py",
        old="            self.param_groups.pop()\n            raise\n",
        new="            raise\n",
        source="ours: torch adds a group before anybody can look at it",
        clauses=("ERR-2",),
    ),
    Mutant(
        name="three dimensions taken for a batch of matrices",
        path="impl/options.py",
        old="elif p.ndim != 2:",
        new="elif p.ndim < 2:",
        source="microsoft/dion and torchtitan: three dimensions are a batch, whatever was meant",
        clauses=("ERR-2", "ERR-4"),
        seed="experts",
    ),
    Mutant(
        name="complex parameters stepped by their real part",
        path="impl/state.py",
        old="        if p.is_complex():\n",
        new="        if p.is_complex() and keys == ():\n",
        source="KellerJordan/Muon, microsoft/dion and Emerging-Optimizers have no such check",
        clauses=("ERR-3",),
    ),
    Mutant(
        name="steps without end accepted",
        path="impl/state.py",
        old='or not 0 <= float(value) < float("inf"):',
        new='or not 0 <= float(value) <= float("inf"):',
        source="ours: a comparison that lets infinity pass, after which no bias is corrected",
        clauses=("STATE-4",),
    ),
    Mutant(
        name="schedules judged without room for rounding",
        path="impl/schedules.py",
        old="    low, high = image(quintics, 0.0, 1.0 + 2.0**-10)",
        new="    low, high = image(quintics, 0.0, 1.0)",
        source="ours: a singular value may come out of its scaling a little above 1",
        clauses=("ORTH-10",),
    ),
)
