import { fromRest } from './errors.js'
import type { RestError } from './errors.js'
import { answerTo } from './limit.js'
import { Live } from './live.js'
import type {
  AnyClient, AssetIdOf, Cancelled, Enqueued, Job, JobsOptions, Listener, LiveStatus, RateLimit, RequestType, StrategyPlan, Usage,
  WorkspaceIdOf,
} from './types.js'

export { oneAtATime } from './changes.js'
export { AutotagError } from './errors.js'
export { describeEta, describeStage, ENGLISH } from './stage.js'
export type { DescribeOptions, StageColumns, StageDescription, StageTexts } from './stage.js'
export type {
  AnyClient, AssetIdOf, Batch, BatchComplete, Cancelled, Enqueued, Job, JobComplete, JobProgress, JobsOptions, JobStatus, Listener,
  LiveStatus, RateLimit, RequestType, Stage, Strategy, StrategyPlan, Usage, WorkspaceIdOf,
} from './types.js'

export interface AutotagOptions<C extends AnyClient> {
  workspaceId: WorkspaceIdOf<C>
  /**
   * The token of the current user. Needed only if supabase-js does not know it, because you call `supabase.realtime.setAuth(token)`
   * yourself. Leave it out with the option `accessToken` of `createClient` and with sessions of `supabase.auth`.
   */
  accessToken?: (() => Promise<string | null>) | undefined
}

/** A workspace's tagging. Calls reject with an AutotagError. */
export interface Autotag<C extends AnyClient = AnyClient> {
  readonly workspaceId: WorkspaceIdOf<C>
  /** Whether messages arrive. */
  readonly status: LiveStatus
  /** Makes one upload of these images (at most 50,000). It returns at once. */
  enqueue(assetIds: readonly AssetIdOf<C>[]): Promise<Enqueued>
  /** Stops an upload. Images that are done stay done. */
  cancel(jobId: string): Promise<Cancelled>
  /** Makes a new upload of the failed images of an upload. */
  retry(jobId: string): Promise<Enqueued>
  /** The workspace's uploads, newest first. */
  jobs(options?: JobsOptions): Promise<Job[]>
  job(jobId: string): Promise<Job>
  /** How an upload of this many images would be processed. */
  strategy(imageCount: number): Promise<StrategyPlan>
  /** Usage by user, day, model and tier. Dates are inclusive: '2026-11-01'. */
  usage(period?: { since?: string, until?: string }): Promise<Usage[]>
  /** Whether the limits allow this many images now. Uses up nothing. */
  peekRateLimit(requestType: RequestType, imageCount: number): Promise<RateLimit>
  /** Calls the listener at changes, until the returned function is called. All parts of a page share one channel. */
  subscribe(listener: Listener<AssetIdOf<C>>): () => void
  /** Joins again at once: after the app was in the background (React Native), or when a token provider has a new user. */
  reconnect(): Promise<void>
}

const lives = new WeakMap<AnyClient, Map<string, Live<never>>>()

/** The workspace's channel: one for each client of supabase-js. */
function liveOf<Id>(supabase: AnyClient, workspaceId: string | number, accessToken?: () => Promise<string | null>): Live<Id> {
  const own = lives.get(supabase) ?? new Map<string, Live<never>>()
  lives.set(supabase, own)
  const key = String(workspaceId)
  const live = own.get(key) ?? new Live<never>(supabase, workspaceId, accessToken)
  own.set(key, live)
  if (accessToken) live.accessToken = accessToken
  return live as unknown as Live<Id>
}

/** The client of one workspace. It does nothing until it is called. */
export function createAutotag<C extends AnyClient>(supabase: C, options: AutotagOptions<C>): Autotag<C> {
  type Id = AssetIdOf<C>
  const { workspaceId, accessToken } = options
  const live = liveOf<Id>(supabase, workspaceId as string | number, accessToken)

  async function call<T>(name: string, args: Record<string, unknown>): Promise<T> { return await result(supabase.rpc(name, args)) }

  /** Runs a call that changes nothing. It fails if it takes too long. */
  async function read<T>(name: string, args: Record<string, unknown>): Promise<T> { return await result(answerTo(supabase.rpc(name, args))) }

  async function result<T>(answer: PromiseLike<{ data: unknown, error: RestError | null, status: number }>): Promise<T> {
    const { data, error, status } = await answer
    if (error) throw fromRest(error, status)
    return data as T
  }

  async function jobs({ onlyLive = false, before, limit = 50 }: JobsOptions = {}): Promise<Job[]> {
    const until = before instanceof Date ? before.toISOString() : before
    return await read('tagging_jobs', {
      workspace_id: workspaceId, only_live: onlyLive, limit, ...until && { before: until },
    })
  }

  return {
    workspaceId,
    get status() { return live.status },
    async enqueue(assetIds) {
      const since = Date.now()
      const made = await call<Enqueued>('enqueue_tagging', { asset_ids: assetIds })
      if (made.image_count && !made.skipped) live.enqueued(assetIds, since)
      else live.changed([...assetIds], made.job_id)
      return made
    },
    async cancel(jobId) {
      const done = await call<Cancelled>('cancel_tagging', { job_id: jobId })
      if (live.status !== 'live') live.changed(null, jobId) // otherwise a message reports it
      return done
    },
    async retry(jobId) {
      const made = await call<Enqueued>('retry_tagging', { job_id: jobId })
      if (made.image_count) live.changed(null, made.job_id)
      return made
    },
    jobs,
    job: (jobId) => read('tagging_job', { job_id: jobId }),
    strategy: (imageCount) => read('tagging_strategy', { image_count: imageCount }),
    usage: (period = {}) => read('tagging_usage', { workspace_id: workspaceId, ...period }),
    peekRateLimit: (requestType, imageCount) =>
      read('peek_rate_limit', { workspace_id: workspaceId, request_type: requestType, image_count: imageCount }),
    subscribe: (listener) => live.listen(listener),
    reconnect: () => live.connect(),
  }
}

/** For the hooks. */
export { liveOf as _liveOf }
