// A page with a list of images, as an adopter would write it: with the package, or (client=old) with the snippets that the
// documents had before. tests/browser/client.mjs drives it. The address says what it does: #{"url", "anonKey", "workspace", …}.
import { createClient } from '@supabase/supabase-js'
import { QueryClient, QueryClientProvider, useQuery, useQueryClient } from '@tanstack/react-query'
import { Activity, StrictMode, useEffect, useState } from 'react'
import { createRoot } from 'react-dom/client'
import { describeStage } from 'supabase-autotag'
import { AutotagProvider, useAssets, useTagging } from 'supabase-autotag/react'

const given = JSON.parse(decodeURIComponent(location.hash.slice(1)))
const COLUMNS = 'id, created_at, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'

/** A token provider as Clerk's: it keeps a token until shortly before its end. */
let kept = null
async function accessToken() {
  if (!kept || kept.until < Date.now()) kept = await window.mint(given.member)
  return kept.token
}
const supabase = createClient(given.url, given.anonKey, given.sessions ? { auth: { storageKey: 'session' } } : { accessToken })
window.supabase = supabase
window.statuses = []

const insert = async (paths) => (await supabase.from('assets')
  .insert(paths.map((storage_path) => ({ workspace_id: given.workspace, storage_path }))).select(COLUMNS).throwOnError()).data

function Row({ row }) {
  const { text, progress } = describeStage(row)
  return <li data-id={row.id} data-stage={row.tagging_stage ?? 'none'} data-tags={row.tags?.join()} data-progress={progress}>{text}</li>
}

function Gallery({ name }) {
  const { rows, put, loadMore, hasMore } = useAssets({
    query: () => supabase.from('assets').select(COLUMNS).eq('workspace_id', given.workspace),
  })
  const { status, error, jobs, enqueue, cancel } = useTagging()
  useEffect(() => { window.statuses.push(error ? `${status}: ${error.code}` : status) }, [status, error])
  window.upload = async (paths) => {
    const made = await insert(paths)
    put(made)
    await enqueue.mutateAsync(made.map((row) => row.id)).catch(() => undefined)
    return made.map((row) => row.id)
  }
  window.loadMore = loadMore
  return <section id={name} data-status={status} data-more={hasMore}>
    <p className="refusal">{enqueue.error && `${enqueue.error.message} ${enqueue.error.hint}`}</p>
    {jobs.map((job) => <p key={job.job_id} className="job" data-job={job.job_id} data-status={job.status} data-over={Boolean(job.finished_at)}>
      <span>{job.completed + job.failed} of {job.image_count} {job.status}</span> <button onClick={() => cancel.mutate(job.job_id)}>Cancel</button></p>)}
    <ul>{rows.map((row) => <Row key={row.id} row={row} />)}</ul>
  </section>
}

// -- as the documents had it

function useOldAssets(workspaceId, setStatus, showJob) {
  const client = useQueryClient()
  useEffect(() => {
    const changed = () => client.invalidateQueries({ queryKey: ['assets', workspaceId] })
    const channel = supabase.channel(`tagging:${workspaceId}`, { config: { private: true } })
      .on('broadcast', { event: '*' }, ({ payload }) => { if ('completed' in payload) showJob(payload); changed() })
      .subscribe((status) => { window.statuses.push(status); setStatus(status); if (status === 'SUBSCRIBED') changed() })
    return () => { supabase.removeChannel(channel) }
  }, [client, workspaceId])
  return useQuery({
    queryKey: ['assets', workspaceId],
    queryFn: async () => (await supabase.from('assets').select().eq('workspace_id', workspaceId).throwOnError()).data,
    staleTime: Infinity,
  })
}

const TEXTS = { queued: 'Queued for tagging', submitted: 'Submitted to AI', processing: 'AI analyzing', completed: 'Tagged', failed: 'Failed' }

/** `job` is what enqueue_tagging has returned, and then what messages tell of it. Nothing leads to the upload of another window. */
function OldGallery({ name }) {
  const [status, setStatus] = useState('')
  const [job, setJob] = useState(null)
  const { data } = useOldAssets(given.workspace, setStatus, (told) => setJob((mine) => mine?.job_id === told.job_id ? told : mine))
  const client = useQueryClient()
  window.upload = async (paths) => {
    const made = await insert(paths)
    client.invalidateQueries({ queryKey: ['assets', given.workspace] })
    const { data: job, error } = await supabase.rpc('enqueue_tagging', { asset_ids: made.map((row) => row.id) })
    setJob(job)
    document.querySelector('.refusal').textContent = error ? `${error.message} ${error.hint}` : ''
    return made.map((row) => row.id)
  }
  return <section id={name} data-status={status === 'SUBSCRIBED' ? 'live' : 'connecting'}>
    <p className="refusal"></p>
    {job?.job_id && <p className="job"><span>{(job.completed ?? 0) + (job.failed ?? 0)} of {job.image_count}</span>
      <button onClick={() => supabase.rpc('cancel_tagging', { job_id: job.job_id }).then()}>Cancel</button></p>}
    <ul>{data?.map((row) => <li key={row.id} data-id={row.id} data-stage={row.tagging_stage ?? 'none'} data-tags={row.tags?.join()}>
      {TEXTS[row.tagging_stage] ?? 'Tagging…'}</li>)}</ul>
  </section>
}

const Shown = given.client === 'old' ? OldGallery : Gallery

/** Another component of the page. */
function Jobs() {
  const { jobs } = useTagging()
  return <p>{jobs.length} uploads</p>
}

function Two() {
  const [shown, setShown] = useState({ one: true, two: given.two, hidden: false })
  window.show = (change) => setShown((before) => ({ ...before, ...change }))
  return <>
    {given.strict && <Jobs />}
    {shown.one && <Activity mode={shown.hidden ? 'hidden' : 'visible'}><Shown name="one" /></Activity>}
    {shown.two && <Shown name="two" />}
  </>
}
const app = <QueryClientProvider client={new QueryClient()}>
  <AutotagProvider supabase={supabase} workspaceId={given.workspace}>
    <Two />
  </AutotagProvider>
</QueryClientProvider>
if (given.client === 'old') await supabase.realtime.setAuth()
createRoot(document.getElementById('root')).render(given.strict ? <StrictMode>{app}</StrictMode> : app)
