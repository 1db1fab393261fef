"""Batches: the body of several requests that are answered in one stream, each as if it had come alone."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from app.errors import InstepError
from app.jobs.body import ImageBody, read_as, read_body
from app.jobs.compare import bounded
from app.jobs.fields import expects
from app.jobs.job import Job

REQUESTS = 16
"""The most requests of a batch."""


class BatchBody(BaseModel):
    """The body of POST /v1/images/batch."""

    requests: Annotated[
        list[Any], Field(min_length=1, max_length=REQUESTS), expects(f"a list of 1 to {REQUESTS} bodies")
    ] = Field(description="Bodies of POST /v1/images/generations, for any models; `stream` goes without saying")


def batch_jobs(raw: object, complete: Callable[[ImageBody], Job]) -> list[Job]:
    """One job for each request of a parsed JSON body. complete: makes the job of a request.

    Raises RequestError and ModelNotFound, which name the request and its field as `requests[2].size`.
    """
    jobs = []
    for place, one in enumerate(read_as(BatchBody, raw, BatchBody.model_fields).requests):
        try:
            jobs.append(complete(read_body(one).model_copy(update={"stream": True})))
        except InstepError as error:
            raise of_request(error, place) from None
        jobs[-1].place = place
    return bounded(jobs, "a batch", "requests")


def of_request(error: InstepError, place: int) -> InstepError:
    """The error of one request of a batch, which names it."""
    name = f"requests[{place}]"
    return error.again(f"{name}: {error.message}", f"{name}.{error.param}" if error.param else name)
