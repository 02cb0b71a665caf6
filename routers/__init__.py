"""Routers. `ROUTERS` names the built-in plugins."""

if __name__ != "molora.routers":
    raise ImportError(f"import 'molora.routers', not {__name__!r}: one file under two names is two modules")

ROUTERS = {
    "table": "molora.routers.table:TableRouter",
    "sum": "molora.routers.sum:SumRouter",
    "learned": "molora.routers.learned:LearnedRouter",
}
