"""The OpenAI simulator behaves as OpenAI and compatible servers do, so that tests may rely on it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, get_args

import httpx
import pytest
from PIL import Image

from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.faults import AnswerVariant, Fault
from lab.openai_sim.models import EFFORTS, MODELS, dollars
from lab.openai_sim.plan import REASONING_TOKENS
from support import PATIENCE

SCHEMA = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
STRICT = {"type": "json_schema", "json_schema": {"name": "tags", "strict": True, "schema": SCHEMA}}
ASKED = "Tag this image as JSON."
LONG = "x" * 8000  # characters of instructions: 2,000 tokens


def picture(colour: str = "red", side: int = 64) -> str:
    """A data URL of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def request(
    model: str = "gpt-6-luna", *, system: str = "You tag.", url: str | None = None, side: int = 64, **changes: Any
) -> dict[str, Any]:
    """The body of a completion with these changes; None removes a field."""
    image = {"type": "image_url", "image_url": {"url": url or picture(side=side), "detail": "low"}}
    body = {
        "model": model, "max_completion_tokens": 2000, "response_format": STRICT,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": [{"type": "text", "text": ASKED}, image]},
        ],
    } | changes  # fmt: skip
    return {name: value for name, value in body.items() if value is not None}


class Api:
    """The simulator in this process, and its answers."""

    def __init__(self) -> None:
        self.sim = Simulator(Plan(latency=(0, 0), batch_latency=(0.02, 0.02)))
        self.plan = self.sim.plan
        transport = httpx.ASGITransport(self.sim.app())
        headers = {"authorization": f"Bearer {self.plan.key}"}
        self.http = httpx.AsyncClient(transport=transport, base_url="http://openai", headers=headers)

    async def complete(self, model: str = "gpt-6-luna", **changes: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=request(model, **changes))

    async def answer(self, model: str = "gpt-6-luna", **changes: Any) -> dict[str, Any]:
        """The completion, which must succeed."""
        response = await self.complete(model, **changes)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def refusal(self, model: str = "gpt-6-luna", **changes: Any) -> dict[str, Any]:
        """The error object of a 400."""
        response = await self.complete(model, **changes)
        assert response.status_code == 400, response.text
        return dict(response.json()["error"])

    async def upload(self, *bodies: dict[str, Any], expires: int | None = None) -> httpx.Response:
        lines = [
            json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body})
            for i, body in enumerate(bodies)
        ]
        data = {"purpose": "batch"}
        if expires is not None:
            data |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires)}
        files = {"file": ("lines.jsonl", "\n".join(lines))}
        return await self.http.post("/v1/files", data=data, files=files)

    async def create_batch(self, file: str, **more: Any) -> httpx.Response:
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
        return await self.http.post("/v1/batches", json=body)

    async def batch(self, *bodies: dict[str, Any]) -> dict[str, Any]:
        """Runs a batch of these lines, and returns it when it has ended."""
        file = (await self.upload(*bodies)).json()["id"]
        batch = (await self.create_batch(file)).json()
        async with asyncio.timeout(PATIENCE):
            while batch["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.01)
                batch = (await self.http.get(f"/v1/batches/{batch['id']}")).json()
        return dict(batch)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api = Api()
    async with api.http:
        yield api
        await api.sim.batches.close()


def visible(answer: dict[str, Any]) -> Any:
    return answer["choices"][0]["message"]["content"]


# -- models and prices


@pytest.mark.parametrize(
    ("name", "date"),
    [("gpt-4o-mini", "2027-01-14"), ("gpt-4.1-mini-2025-04-14", "2027-01-14"), ("gpt-6-luna", None)],
)
async def test_a_model_says_when_it_is_shut_down(api: Api, name: str, date: str | None) -> None:
    told = (await api.http.get(f"/v1/models/{name}")).json()
    listed = {model["id"]: model for model in (await api.http.get("/v1/models")).json()["data"]}
    assert (told["id"], told["shutdown_date"]) == (name, date)
    assert listed[name] == told


async def test_a_dated_snapshot_is_asked_by_its_own_name(api: Api) -> None:
    by_name = await api.answer("gpt-4.1-mini")
    by_date = await api.answer(by_name["model"])
    assert by_date["model"] == by_name["model"] == "gpt-4.1-mini-2025-04-14"
    assert by_date["usage"] == by_name["usage"]


@pytest.mark.parametrize(
    ("model", "detail", "side", "tokens"),
    [
        ("gpt-6-luna", "low", 512, 308),  # 256 patches × 1.2
        ("gpt-6-luna", "high", 512, 308),
        ("gpt-6-luna", "low", 2048, 1844),  # at most 1,536 patches
        ("gpt-4.1-mini", "low", 512, 415),
        ("gpt-4o-mini", "low", 1024, 2833),
        ("gpt-4o-mini", "high", 1024, 2833 + 4 * 5667),
        ("gpt-4o", "high", 512, 85 + 170),
    ],
)
async def test_an_image_costs_what_its_model_counts(api: Api, model: str, detail: str, side: int, tokens: int) -> None:
    body = request(model, side=side)
    body["messages"][1]["content"][1]["image_url"]["detail"] = detail
    answer = (await api.http.post("/v1/chat/completions", json=body)).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == tokens


@pytest.mark.parametrize(
    ("model", "tier", "batch", "cached", "written", "expected"),
    [
        ("gpt-6-luna", "default", False, 0, 0, "0.60"),
        ("gpt-6-luna-2026-10-06", "default", False, 0, 0, "0.60"),
        ("gpt-6-luna", "default", True, 0, 0, "0.30"),
        ("gpt-6-luna", "flex", False, 0, 0, "0.30"),
        ("gpt-6-luna", "fast", False, 0, 0, "1.20"),
        ("gpt-6-luna", "priority", False, 0, 0, "1.20"),
        ("gpt-6-luna", "default", False, 1_000_000, 0, "0.51"),
        ("gpt-6-luna", "default", False, 0, 1_000_000, "0.625"),
        ("gpt-4.1-mini", "default", False, 500_000, 0, "1.85"),
    ],
)
def test_an_answer_is_priced_by_tier_and_cache(
    model: str, tier: str, batch: bool, cached: int, written: int, expected: str
) -> None:
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000, "prompt_tokens_details": details}
    assert dollars(model, usage, tier, batch) == Decimal(expected)


# -- tokens


async def test_text_counts_by_its_length_and_the_limits_meter_prompt_and_cap(api: Api) -> None:
    body = request(max_completion_tokens=777, reasoning_effort="none")
    answer = (await api.http.post("/v1/chat/completions", json=body)).json()
    text = math.ceil(len("You tag." + ASKED) / 4) + math.ceil(len(json.dumps(SCHEMA, separators=(",", ":"))) / 4)
    assert answer["usage"]["prompt_tokens_details"]["text_tokens"] == text
    assert answer["usage"]["prompt_tokens"] == text + 5  # 4 patches × 1.2
    assert api.sim.count_tokens(body) == text + 5 + 777
    assert api.sim.request_log[-1]["tokens"] == text + 5 + 777
    plain = await api.answer(response_format=None)
    assert plain["usage"]["prompt_tokens_details"]["text_tokens"] == math.ceil(len("You tag." + ASKED) / 4)


async def test_a_batch_queues_what_its_lines_count_for(api: Api) -> None:
    body = request()
    api.plan.queued_batch_tokens = 2 * api.sim.count_tokens(body)
    assert (await api.batch(body, body))["status"] == "completed"
    api.plan.queued_batch_tokens -= 1
    refused = await api.batch(body, body)
    assert (refused["status"], refused["errors"]["data"][0]["code"]) == ("failed", "token_limit_exceeded")


# -- reasoning


@pytest.mark.parametrize("effort", EFFORTS)
async def test_thinking_is_billed_by_effort_and_is_the_same_each_time(api: Api, effort: str) -> None:
    first, again = [await api.answer(reasoning_effort=effort, max_completion_tokens=None) for _ in "12"]
    thought = first["usage"]["completion_tokens_details"]["reasoning_tokens"]
    fewest, most = REASONING_TOKENS[effort]
    assert fewest <= thought <= most
    assert first["usage"] == again["usage"]
    assert first["usage"]["completion_tokens"] == thought + math.ceil(len(visible(first)) / 4) + 1
    assert api.sim.request_log[-1]["effort"] == effort


async def test_a_reasoning_model_thinks_at_medium_unless_it_is_told(api: Api) -> None:
    unasked, asked = await api.answer(), await api.answer(reasoning_effort="medium")
    assert unasked["usage"] == asked["usage"]
    assert unasked["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 200
    plain = await api.answer("gpt-4.1-mini")
    assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_thinking_that_eats_the_cap_leaves_an_empty_answer_that_is_billed(api: Api) -> None:
    api.plan.reasoning_tokens["low"] = (100, 100)
    for _ in "12":  # the same again
        answer = await api.answer(reasoning_effort="low", max_completion_tokens=80)
        assert (visible(answer), answer["choices"][0]["finish_reason"]) == ("", "length")
        assert answer["usage"]["completion_tokens"] == 80
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 80


async def test_an_answer_that_does_not_fit_beside_the_thinking_is_cut(api: Api) -> None:
    api.plan.reasoning_tokens["low"] = (100, 100)
    whole = await api.answer(reasoning_effort="low")
    cut = await api.answer(reasoning_effort="low", max_completion_tokens=110)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert visible(cut) == visible(whole)[:40]
    assert (cut["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (110, "stop")


async def test_usage_names_every_kind_of_token(api: Api) -> None:
    new, old = await api.answer(), await api.answer("gpt-4.1-mini")
    details = {"cached_tokens", "image_tokens", "text_tokens", "audio_tokens"}
    assert new["usage"]["prompt_tokens_details"].keys() == details | {"cache_write_tokens"}
    assert old["usage"]["prompt_tokens_details"].keys() == details
    assert old["usage"]["total_tokens"] == old["usage"]["prompt_tokens"] + old["usage"]["completion_tokens"]


# -- what a model does not support

UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."


@pytest.mark.parametrize(
    ("model", "changes", "param", "code", "message"),
    [
        ("gpt-6-luna", {"max_completion_tokens": None, "max_tokens": 9}, "max_tokens", "unsupported_parameter",
         UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead."),
        ("gpt-6-luna", {"reasoning_effort": "minimal"}, "reasoning_effort", "unsupported_value", "'minimal'"),
        ("o3-mini", {"reasoning_effort": "none"}, "reasoning_effort", "unsupported_value", "'none'"),
        ("gpt-6-luna", {"temperature": 0.2}, "temperature", "unsupported_parameter", UNSUPPORTED.format("temperature")),
        ("gpt-5.4-mini", {"top_p": 0.9}, "top_p", "unsupported_parameter", UNSUPPORTED.format("top_p")),
        ("gpt-5.6-sol", {"logprobs": True}, "logprobs", "unsupported_parameter", UNSUPPORTED.format("logprobs")),
        ("gpt-4.1-mini", {"reasoning_effort": "none"}, None, None,
         "Unrecognized request argument supplied: reasoning_effort"),
        ("o3-mini", {}, "messages.[1].content.[1].type", "invalid_value",
         "Invalid content type. image_url is only supported by certain models."),
        ("gpt-4.1-mini", {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_type", "positive integer"),
        ("gpt-4.1-mini", {"max_tokens": 9}, "max_tokens", "invalid_parameter_combination", "at the same time"),
        ("gpt-4.1-mini", {"service_tier": "turbo"}, "service_tier", "invalid_value", "'turbo'"),
        ("gpt-6-luna", {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'xml'"),
        ("gpt-6-luna", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
         "response_format", "invalid_request_error", "strict"),
        ("gpt-6-luna", {"messages": [{"role": "user"}]}, "messages", "invalid_request_error", "malformed"),
    ],
)  # fmt: skip
async def test_what_a_model_does_not_support_is_refused_in_openais_words(
    api: Api, model: str, changes: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    error = await api.refusal(model, **changes)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert message in error["message"]
    assert api.sim.request_log[-1]["error"] == (code or error["message"])


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("gpt-6-luna", {"temperature": 0.2, "top_p": 0.9, "reasoning_effort": "none"}),
        ("gpt-4.1-mini", {"temperature": 0.2, "max_completion_tokens": None, "max_tokens": 300}),
        ("gpt-6-luna", {"max_completion_tokens": None}),
        ("gpt-6-luna", {"response_format": {"type": "json_object"}}),
        ("gpt-6-luna", {"response_format": {"type": "text"}}),
    ],
)
async def test_what_a_model_supports_is_answered(api: Api, model: str, changes: dict[str, Any]) -> None:
    answer = await api.answer(model, **changes)
    assert json.loads(visible(answer))["tags"][0]["tag"] == "Top Left Red"


# -- prompt caching


async def test_a_long_prefix_is_written_to_the_cache_once_and_read_from_then_on(api: Api) -> None:
    used = [
        (await api.answer(system=LONG, url=picture(colour)))["usage"]["prompt_tokens_details"]
        for colour in ("red", "blue", "green")
    ]
    prefix = used[0]["text_tokens"]
    assert [(u["cached_tokens"], u["cache_write_tokens"]) for u in used] == [
        (0, prefix), (prefix // 128 * 128, 0), (prefix // 128 * 128, 0)
    ]  # fmt: skip
    assert Decimal(api.sim.request_log[0]["dollars"]) > Decimal(api.sim.request_log[1]["dollars"])


@pytest.mark.parametrize("other", [{"model": "gpt-5.6-luna"}, {"system": LONG + "y"}, {"response_format": None}])
async def test_another_model_text_or_schema_shares_no_cache(api: Api, other: dict[str, Any]) -> None:
    await api.answer(system=LONG)
    answer = await api.answer(**{"system": LONG} | other)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_a_short_prefix_is_not_cached(api: Api) -> None:
    used = [(await api.answer())["usage"]["prompt_tokens_details"] for _ in "12"]
    assert [(u["cached_tokens"], u["cache_write_tokens"]) for u in used] == [(0, 0), (0, 0)]


# -- service tiers


@pytest.mark.parametrize(
    ("model", "asked", "billed"),
    [
        ("gpt-6-luna", None, "default"), ("gpt-6-luna", "auto", "default"), ("gpt-6-luna", "flex", "flex"),
        ("gpt-6-luna", "fast", "fast"), ("gpt-4.1-mini", "flex", "default"),
    ],
)  # fmt: skip
async def test_an_answer_says_in_which_tier_it_was_billed(api: Api, model: str, asked: str | None, billed: str) -> None:
    answer = await api.answer(model, service_tier=asked)
    assert answer["service_tier"] == api.sim.request_log[-1]["tier"] == billed
    assert api.sim.request_log[-1]["dollars"] == str(dollars(model, answer["usage"], billed))


async def test_flex_may_have_no_resources_while_other_tiers_go_on(api: Api) -> None:
    api.plan.flex_available = False
    response = await api.complete(service_tier="flex")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "resource_unavailable")
    assert "usage" not in api.sim.request_log[-1]
    await api.answer()


# -- other servers and other accounts


@pytest.mark.parametrize(
    ("plan", "changes", "status", "error"),
    [
        ({"credit": False}, {}, 429, "insufficient_quota"),
        ({"models": frozenset({"gpt-4.1-mini"})}, {}, 404, "model_not_found"),
        ({"vision": False}, {}, 400, "Model does not support images. Please use a model that does."),
        ({"response_formats": frozenset({"json_object", "text"})}, {}, 422,
         "Failed to deserialize the JSON body: response_format: response_format.type `json_schema` is unavailable now"),
        ({"token_parameters": frozenset({"max_tokens"})}, {}, 400,
         "Unrecognized request argument supplied: max_completion_tokens"),
        ({"effort_parameter": False}, {"reasoning_effort": "none"}, 400, "unknown_parameter"),
        ({"detail_parameter": False}, {}, 400, "unknown_parameter"),
        ({"key": "another"}, {}, 401, "invalid_api_key"),
    ],
)  # fmt: skip
async def test_what_a_server_lacks_is_looked_up_at_each_request(
    api: Api, plan: dict[str, Any], changes: dict[str, Any], status: int, error: str
) -> None:
    await api.answer(**changes)
    before = {name: getattr(api.plan, name) for name in plan}
    for name, value in plan.items():
        setattr(api.plan, name, value)
    response = await api.complete(**changes)
    assert (response.status_code, api.sim.request_log[-1]["error"]) == (status, error)
    for name, value in before.items():
        setattr(api.plan, name, value)
    await api.answer(**changes)


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        ({"response_formats": frozenset({"json_object"})}, {"response_format": {"type": "json_object"}}),
        ({"response_formats": frozenset()}, {"response_format": None}),
        ({"token_parameters": frozenset({"max_tokens"})}, {"max_completion_tokens": None, "max_tokens": 2000}),
        ({"token_parameters": frozenset()}, {"max_completion_tokens": None}),
        ({"effort_parameter": True}, {"model": "gpt-4.1-mini", "reasoning_effort": "none"}),
        ({"models": frozenset({"qwen/qwen3-vl"})}, {"model": "qwen/qwen3-vl"}),
    ],
)
async def test_a_server_answers_in_its_own_way(api: Api, plan: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in plan.items():
        setattr(api.plan, name, value)
    assert json.loads(visible(await api.answer(**changes)))["tags"]


async def test_the_detail_that_a_server_does_not_know_is_named_by_its_place(api: Api) -> None:
    api.plan.detail_parameter = False
    assert "messages[1].content[1].image_url.detail" in (await api.refusal())["message"]


async def test_a_server_without_the_batch_api_has_neither_files_nor_batches(api: Api) -> None:
    api.plan.batch_api = False
    for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1"):
        response = await api.http.get(path)
        assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
    assert (await api.upload(request())).status_code == 404
    await api.answer()


async def test_a_server_may_want_files_kept_longer(api: Api) -> None:
    file = (await api.upload(request(), expires=3600)).json()["id"]
    api.plan.min_expires = 1_209_600
    upload = await api.upload(request(), expires=3600)
    batch = await api.create_batch(file, output_expires_after={"anchor": "created_at", "seconds": 3600})
    for refused in (upload, batch):
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_after.seconds")
        assert "expires_after" in refused.json()["error"]["message"]
    assert (await api.upload(request(), expires=1_209_600)).status_code == 200


async def test_an_account_without_credit_gets_no_batch(api: Api) -> None:
    file = (await api.upload(request())).json()["id"]
    api.plan.credit = False
    refused = await api.create_batch(file)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")


async def test_a_server_may_send_no_rate_headers(api: Api) -> None:
    assert "x-ratelimit-remaining-tokens" in (await api.complete()).headers
    api.plan.rate_headers = False
    assert not [name for name in (await api.complete()).headers if name.startswith("x-ratelimit")]


async def test_models_are_those_of_the_account_where_they_are_told_at_all(api: Api) -> None:
    api.plan.models = frozenset({"gpt-4.1-mini", "qwen/qwen3-vl"})
    listed = (await api.http.get("/v1/models")).json()["data"]
    assert {model["id"]: model["shutdown_date"] for model in listed} == {
        "gpt-4.1-mini": "2027-01-14", "qwen/qwen3-vl": None
    }  # fmt: skip
    assert (await api.http.get("/v1/models/qwen/qwen3-vl")).status_code == 200
    assert (await api.http.get("/v1/models/gpt-6-luna")).status_code == 404
    api.plan.models_endpoint = False
    assert (await api.http.get("/v1/models")).status_code == 404


async def test_a_wrong_path_answers_plain_text_and_stands_in_the_book(api: Api) -> None:
    response = await api.http.post("/chat/completions", json=request())
    assert (response.status_code, response.text) == (404, "404 page not found")
    assert response.headers["content-type"].startswith("text/plain")
    [entry] = api.sim.request_log
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/chat/completions", 404)


# -- other models' ways to answer


@pytest.mark.parametrize("way", get_args(AnswerVariant))
async def test_every_ordered_way_to_answer_differs_from_the_right_one_and_hits_once(
    api: Api, way: AnswerVariant
) -> None:
    right = (await api.answer())["choices"]
    api.sim.faults.add(Fault(answer=way))
    assert (await api.answer())["choices"] != right
    assert (await api.answer())["choices"] == right


@pytest.mark.parametrize(
    ("way", "start", "end"),
    [
        ("fence", "```json\n{", "}\n```"), ("text_around", "Here are", "more."), ("bom", "\ufeff{", "}"),
        ("thinking", '<think> maybe {"tags": ["wrong"]} …', "}"),
    ],
)  # fmt: skip
async def test_text_around_the_json(api: Api, way: AnswerVariant, start: str, end: str) -> None:
    right = visible(await api.answer())
    api.sim.faults.add(Fault(answer=way))
    content = visible(await api.answer())
    assert content.startswith(start)
    assert content.endswith(end)
    assert right in content


async def test_other_forms_of_the_tags(api: Api) -> None:
    ways: list[AnswerVariant] = ["extra_key", "word_confidence", "percent", "string_tags"]
    said = {}
    for way in ways:
        api.sim.faults.add(Fault(answer=way))
        said[way] = json.loads(visible(await api.answer()))
    assert said["extra_key"].keys() == {"caption", "tags", "mood"}
    assert {tag["confidence"] for tag in said["word_confidence"]["tags"]} == {"high"}
    assert [tag["confidence"] for tag in said["percent"]["tags"]] == [99, 94, 89, 84, 79, 74]
    assert said["string_tags"]["tags"][0] == "Top Left Red"


async def test_answers_without_a_message(api: Api) -> None:
    ways: list[AnswerVariant] = ["null_content", "empty_choices", "error_in_200", "safety"]
    said = []
    for way in ways:
        api.sim.faults.add(Fault(answer=way))
        said.append(await api.answer())
    assert visible(said[0]) is None
    assert said[1]["choices"] == []
    assert said[2] == {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 429}}
    assert said[3]["choices"] == [{"finish_reason": "content_filter: SAFETY", "index": 0}]
    assert [entry["usage"] is None for entry in api.sim.request_log] == [False, False, True, False]
    assert api.sim.request_log[2]["dollars"] is None


@pytest.mark.parametrize(
    ("body", "kind", "error"),
    [
        ("<html>Bad Gateway</html>", "text/html", "<html>Bad Gateway</html>"),
        ({"message": "down"}, "application/json", "down"),
        ([{"error": 1}], "application/json", "[{'error': 1}]"),
    ],
)
async def test_an_errors_body_is_sent_as_it_was_ordered(api: Api, body: Any, kind: str, error: str) -> None:
    api.sim.faults.add(Fault(status=502, body=body))
    response = await api.complete()
    assert (response.status_code, response.headers["content-type"].split(";")[0]) == (502, kind)
    assert response.text == body if isinstance(body, str) else response.json() == body
    assert api.sim.request_log[-1]["error"] == error


# -- the book


async def test_the_book_says_what_was_asked_and_billed_singly_and_by_batch(api: Api) -> None:
    answer = await api.answer(reasoning_effort="low", service_tier="flex")
    await api.batch(request("gpt-4.1-mini", service_tier="flex"))
    single = api.sim.request_log[0]
    [line] = [entry for entry in api.sim.request_log if entry["method"] == "BATCH"]
    told = ("model", "effort", "cap", "tier", "format")
    assert [single[name] for name in told] == ["gpt-6-luna-2026-10-06", "low", 2000, "flex", "json_schema"]
    assert [line[name] for name in told] == ["gpt-4.1-mini-2025-04-14", None, 2000, "default", "json_schema"]
    assert single["usage"] == answer["usage"]
    assert Decimal(line["dollars"]) == dollars("gpt-4.1-mini", line["usage"], batch=True)


async def test_a_line_that_is_refused_says_why_and_a_model_without_prices_has_no_price(api: Api) -> None:
    api.plan.models = frozenset({"llava", "gpt-6-luna"})
    ended = await api.batch(request("llava"), request(reasoning_effort="minimal"))
    assert ended["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    priced = {entry["model"]: entry for entry in api.sim.request_log if entry["method"] == "BATCH"}
    assert (priced["llava"]["status"], priced["llava"]["dollars"]) == (200, None)
    assert (priced["gpt-6-luna"]["status"], priced["gpt-6-luna"]["error"]) == (400, "unsupported_value")


def test_every_known_model_has_prices_and_reasons_at_an_effort_of_its_own() -> None:
    for model in MODELS.values():
        assert model.prices is not None
        assert model.default_effort in (model.efforts or (None,))
