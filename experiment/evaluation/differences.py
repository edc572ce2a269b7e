"""What makes a network's figures differ from those of the run that it comes from."""

from typing import Any

from experiment.evaluation.accuracy import STEPS


def differences(record: dict[str, Any], config: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Data and teacher that are not the run's, and figures that came out otherwise though measured in the same way.

    Args:
        record: of the evaluation, as ``evaluate.py`` writes it.
        config, result: the run's config.json and result.json; {} where there is none.
    """
    found = []
    for name, what in (("dataset_sha256", "data"), ("teacher_sha256", "teacher")):
        here, there = record[name], config.get(name)
        if here and there and here != there:
            found.append(f"the {what} is not the run's: SHA-256 {here[:12]}..., in its config.json {there[:12]}...")
    if result.get("student_sha256") != record["student_sha256"]:
        return found
    for name, (here, there) in _measured_in_the_same_way(record, config, result).items():
        if here != there:
            found.append(f"{name} is {100 * here:.2f} % here and {100 * there:.2f} % in result.json")
    return found


def _measured_in_the_same_way(
    record: dict[str, Any], config: dict[str, Any], result: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """Accuracies here and in result.json, of what was measured on the same images with the same settings."""
    settings, accuracies, same = record["settings"], record["accuracies"], {}
    if record["test_examples"] == result.get("test_examples"):
        if "clean" in accuracies:
            same["clean"] = (accuracies["clean"][0]["accuracy"], result["clean"])
        monitored = {"epsilons": [config.get("settings", {}).get("epsilon")], "restarts": 1, "start_seed": 0}
        usual = settings["steps"] in (None, STEPS["pgd"]) and all(settings[key] == monitored[key] for key in monitored)
        if "pgd" in accuracies and usual:
            same["PGD-20"] = (accuracies["pgd"][0]["accuracy"], result["pgd20"])
    attack, own = accuracies.get("autoattack", [{}])[0].get("result"), result.get("autoattack")
    if attack and own and all(attack[key] == own.get(key) for key in ("examples", "epsilon", "seed", "batch")):
        same["AutoAttack"] = (attack["accuracy"], own["accuracy"])
    return same
