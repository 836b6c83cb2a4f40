// Compiled by test_snippets.py under `strict`. Each @ts-expect-error fails where the line below it does compile.
import { createClient } from '@supabase/supabase-js'
import { AutotagError, createAutotag, describeStage } from 'supabase-autotag'
import type { Cancelled, Enqueued, Job, JobStatus, RateLimit, RequestType, Stage, Strategy, StrategyPlan, Usage } from 'supabase-autotag'
import { useAssets, useTagging } from 'supabase-autotag/react'
import type { Database } from '../../supabase/types/database.js'

const supabase = createClient<Database>('http://localhost', 'key')
const untyped = createClient('http://localhost', 'key')
const autotag = createAutotag(supabase, { workspaceId: 'w' })

export async function calls(): Promise<void> {
  await autotag.peekRateLimit('batch', 5)
  // @ts-expect-error no such request type
  await autotag.peekRateLimit('typo', 5)
  // @ts-expect-error ids of this project are uuids
  await autotag.enqueue([1])
  // @ts-expect-error a workspace's id, too
  createAutotag(supabase, { workspaceId: 1 })
  await createAutotag(untyped, { workspaceId: 7 }).enqueue([1, '2'])
  const job = await autotag.job('j')
  const stages: number = job.stages.queued
  // @ts-expect-error no such stage
  void job.stages.waiting
  // @ts-expect-error no such strategy
  if (job.strategy === 'burst') return
  // @ts-expect-error null: unknown
  const cost: number = (await autotag.usage())[0]!.cost
  // @ts-expect-error the calls have no such option
  await autotag.jobs({ live: true })
  void [stages, cost]
}

export const stop = autotag.subscribe({
  onProgress(message) {
    const left: string | null = message.eta
    const ids: string[] | null | undefined = message.asset_ids
    // @ts-expect-error no such field
    void message.percent
    void [left, ids]
  },
  onJobComplete(message) {
    // @ts-expect-error only job-progress has it
    void message.progress
  },
  onBatchComplete: (message) => message.status,
  onChange: (ids: string[] | null) => ids,
  // @ts-expect-error no such event
  onDone() {},
})

export function stage(row: Database['public']['Tables']['assets']['Row']): void {
  const described = describeStage(row, { texts: { none: 'ohne', minutes: (n) => `noch ${n} Min.` } })
  if (described.stage === 'failed') return
  // @ts-expect-error no such stage
  if (described.stage === 'done') return
  // @ts-expect-error not a row of a table of images
  describeStage({ tagging_progress: 'half' })
  // @ts-expect-error no such text
  describeStage(row, { texts: { waiting: 'x' } })
}

export function errors(error: unknown): string {
  if (!(error instanceof AutotagError)) return ''
  const seconds: number | null = error.retryAfter
  return `${error.code} ${error.hint} ${seconds}`
}

export function Component(): string {
  const { rows, put } = useAssets({ query: () => supabase.from('assets').select('id, created_at, tags').eq('workspace_id', 'w') })
  const tags: string[] | null | undefined = rows[0]?.tags
  // @ts-expect-error it is not selected
  void rows[0]?.storage_path
  // @ts-expect-error a row without tags
  put([{ id: 'a', created_at: '' }])
  // @ts-expect-error no such column
  useAssets({ orderBy: 'age', query: () => supabase.from('assets').select('id, created_at') })
  const { enqueue, jobs } = useTagging('w')
  enqueue.mutate(['a'])
  // @ts-expect-error images, not one
  enqueue.mutate('a')
  return `${enqueue.error?.hint} ${jobs[0]?.progress} ${String(tags)}`
}

// -- the package's types are those that the CLI generates

type Generated = Database['public']
type EnumOf<N extends string> = Generated['Enums'] extends Record<N, infer E> ? E : never
type Same<A, B> = [B] extends [never] ? true : [A] extends [B] ? [B] extends [A] ? true : false : false
type Result<F extends string> = Generated['Functions'] extends Record<F, { Returns: infer R }>
  ? R extends (infer Row extends object)[] ? Row : R : never
/** Every field that the function returns is there, and none is wider. An older schema returns plain JSON. */
type Fits<F extends string, T> = [Result<F>] extends [never] ? true : string extends Result<F> ? true
  : Record<string, unknown> extends Result<F> ? true : Same<keyof T, keyof Result<F>> extends true ? T extends Result<F> ? true : false : false

export const agrees: [
  Same<Stage, EnumOf<'tagging_stage'>>, Same<Strategy, EnumOf<'tagging_strategy_name'>>, Same<RequestType, EnumOf<'tagging_request_type'>>,
  Same<JobStatus, EnumOf<'tagging_job_status'>>, Fits<'enqueue_tagging', Enqueued>, Fits<'retry_tagging', Enqueued>,
  Fits<'cancel_tagging', Cancelled>, Fits<'tagging_job', Required<Job>>, Fits<'tagging_jobs', Required<Job>>,
  Fits<'tagging_strategy', StrategyPlan>, Fits<'peek_rate_limit', RateLimit>, Same<keyof Usage, keyof Result<'tagging_usage'>>,
] = [true, true, true, true, true, true, true, true, true, true, true, true]
