"""Lets the exporter's optimiser pass over a node that is another operator than a pattern ends with, half a second each.

For every node it would list the whole graph by operators once for each pattern of several outputs. What matches is the
same, so graphs are equal to the byte. Where onnxscript keeps it elsewhere, exports in tests only take longer.
"""

import contextlib
from typing import Any

with contextlib.suppress(ImportError, AttributeError):
    from onnxscript.rewriter._basics import MatchResult
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    match_all = SimplePatternMatcher.match

    def _match_same_operator(
        self: SimplePatternMatcher, model: Any, graph_or_function: Any, node: Any, **options: Any
    ) -> MatchResult:
        last = self.pattern.output_nodes[0]
        if last.op.matches(node.op_type) and last.domain.matches(node.domain):
            return match_all(self, model, graph_or_function, node, **options)
        return MatchResult().fail("another operator")

    SimplePatternMatcher.match = _match_same_operator  # type: ignore[method-assign]
