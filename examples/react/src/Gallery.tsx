import { useState } from 'react'
import type { FormEvent } from 'react'
import { describeEta, describeStage } from 'supabase-autotag'
import { useAssets, useTagging } from 'supabase-autotag/react'
import { supabase } from './supabase'
import { COLUMNS, editTags, quote, upload } from './images'
import type { Image } from './images'

/** A workspace's images: upload, progress, tags, and a filter by tag. */
export function Gallery({ workspaceId }: { workspaceId: string }) {
  const [tag, setTag] = useState('')
  const [problem, setProblem] = useState('')
  const { status, error, jobs, enqueue, cancel, retry } = useTagging(workspaceId)
  const { rows, hasMore, loadMore, isLoadingMore, put } = useAssets<Image>({
    workspaceId,
    query: () => {
      const images = supabase.from('assets').select(COLUMNS).eq('workspace_id', workspaceId)
      return tag ? images.contains('tags', quote([tag])) : images
    },
  })

  async function add(files: FileList | null) {
    setProblem('')
    try {
      const images = await upload(supabase, workspaceId, [...files ?? []])
      put(images)
      await enqueue.mutateAsync(images.map((image) => image.id)).catch(() => undefined) // shown below
    } catch (error) {
      setProblem((error as Error).message)
    }
  }

  async function edit(image: Image, change: (tags: string[]) => string[]) {
    try {
      put([await editTags(supabase, image, change)])
    } catch (error) {
      setProblem((error as Error).message)
    }
  }

  const refusal = enqueue.error ?? retry.error ?? cancel.error
  return (
    <section>
      <p role="status">{status === 'live' ? 'Live' : error?.hint || 'Connecting…'}</p>
      <p role="alert">{problem || (refusal && `${refusal.message} ${refusal.hint}`)}</p>
      {enqueue.data?.image_count === 0 && <p role="status">These images are being tagged, or were a moment ago.</p>}
      <input type="file" aria-label="Add images" multiple accept="image/*" onChange={(event) => add(event.target.files)} />
      <input type="search" aria-label="Filter by tag" value={tag} onChange={(event) => setTag(event.target.value)} />
      <ul aria-label="Uploads">
        {jobs.map((job) => (
          <li key={job.job_id}>
            {job.completed + job.failed} of {job.image_count} images
            {job.finished_at
              ? job.failed > 0 && <button onClick={() => retry.mutate(job.job_id)}>Try again</button>
              : job.cancelled
                ? ' · Cancelling…'
                : <> · {describeEta(job.eta)} <button onClick={() => cancel.mutate(job.job_id)}>Cancel</button></>}
          </li>
        ))}
      </ul>
      <ul aria-label="Images">
        {rows.map((image) => <Card key={image.id} image={image} edit={edit} again={() => enqueue.mutate([image.id])} />)}
      </ul>
      {hasMore && <button disabled={isLoadingMore} onClick={loadMore}>More</button>}
    </section>
  )
}

interface CardProps {
  image: Image
  edit(image: Image, change: (tags: string[]) => string[]): Promise<void>
  again(): void
}

function Card({ image, edit, again }: CardProps) {
  const { text, progress, live, error, stage } = describeStage(image)

  function add(event: FormEvent<HTMLFormElement>) {
    event.preventDefault()
    const tag = String(new FormData(event.currentTarget).get('tag')).trim()
    event.currentTarget.reset()
    if (tag) void edit(image, (tags) => tags.includes(tag) ? tags : [...tags, tag])
  }

  return (
    <li data-id={image.id} data-stage={stage ?? 'none'}>
      {text} {live && progress !== null && <progress value={progress} aria-label={text} />}
      {error && <span>{error}</span>}
      {!live && <button onClick={again}>Tag again</button>}
      <ul aria-label="Tags">
        {image.tags?.map((tag) => (
          <li key={tag}>{tag} <button aria-label={`Remove ${tag}`} onClick={() => edit(image, (tags) => tags.filter((other) => other !== tag))}>×</button></li>
        ))}
      </ul>
      <form onSubmit={add}><input name="tag" aria-label="Add a tag" /><button>Add</button></form>
    </li>
  )
}
