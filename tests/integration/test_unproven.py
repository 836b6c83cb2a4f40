"""A question that is not proven: one image tries it, whatever the strategy of its upload."""

from __future__ import annotations

from support import Library, until, worker


async def test_a_batch_upload_without_express_images_tries_the_question_itself(library: Library) -> None:
    """Both lanes are idle when an upload by batch arrives. The lane of single calls has to notice it, because only that
    lane tries the question."""
    library.stack.configure(express_images=0)
    library.sql("update autotag.provider_limits set proven_at = null")
    ids = await library.upload(60)
    async with worker(library.stack):
        await until(
            lambda: bool(library.sql("""
                select 1 as n from autotag.workers w, autotag.provider_limits p
                where greatest(w.started_at, p.refilled_at) < clock_timestamp() - interval '1 s'""")),
            "both lanes to ask for nothing any more",
        )  # fmt: skip
        await library.finished(library.enqueue(ids))
    library.check_tags()
