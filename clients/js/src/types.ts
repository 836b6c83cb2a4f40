import type { SupabaseClient } from '@supabase/supabase-js'

/** A client of supabase-js, whatever its tables are. */
// eslint-disable-next-line @typescript-eslint/no-explicit-any
export type AnyClient = SupabaseClient<any, any, any>

export type Stage = 'queued' | 'preparing' | 'submitted' | 'processing' | 'completing' | 'completed' | 'failed'
export type Strategy = 'realtime' | 'realtime-chunked' | 'batch' | 'batch-parallel'
/** Of an upload. */
export type JobStatus = 'running' | 'cancelling' | 'completed' | 'cancelled'
export type RequestType = 'realtime' | 'batch'

/** The `Database` of a client's generated types. */
export type DatabaseOf<C> = C extends SupabaseClient<infer D, any, any> ? D : unknown
type Arguments<D, F extends string> = D extends { public: { Functions: Record<F, { Args: infer A }> } } ? A : never
/** The type of an image's id: that of your table's key. */
export type AssetIdOf<C> = Arguments<DatabaseOf<C>, 'enqueue_tagging'> extends { asset_ids: (infer I)[] }
  ? [I] extends [never] ? string | number : I : string | number
/** The type of a workspace's id. */
export type WorkspaceIdOf<C> = Arguments<DatabaseOf<C>, 'peek_rate_limit'> extends { workspace_id: infer I }
  ? [I] extends [never] ? string | number : I : string | number

/** The result of `enqueue` and `retry`. */
export interface Enqueued {
  /** The upload. If every image was skipped: the upload that they are in; null if they are in several, or in none. */
  job_id: string | null
  strategy: Strategy | null
  image_count: number
  /** Images that were skipped, because they are already being tagged, or have just been tagged. */
  skipped: number
  batches: number
  eta: string | null
}

export interface Cancelled {
  job_id: string
  /** The images that this call ended. */
  cancelled: number
}

export interface Batch {
  batch_id: string | null
  state: string
  image_count: number
}

/** An upload. Times are ISO 8601. */
export interface Job {
  job_id: string
  strategy: Strategy
  image_count: number
  /** How many images are in each stage. */
  stages: Record<Stage, number>
  completed: number
  failed: number
  /** 0 to 100. */
  progress: number
  eta: string | null
  eta_p90: string | null
  /** The most frequent error, as a sentence. */
  error: string | null
  /** Why images are not processed in the way that their number implies. */
  fallback: string | null
  batches: Batch[]
  created_at: string
  finished_at: string | null
  cancelled: boolean
  /** `cancelling`: cancelled, but not ended yet. Older servers do not have it. */
  status?: JobStatus
}

export interface JobsOptions {
  /** Only unfinished uploads. Default: false. */
  onlyLive?: boolean
  /** Uploads that were made before this one's `created_at`, for the next page. */
  before?: string | Date
  /** At most this many, newest first. */
  limit?: number
}

/** How an upload of a certain size would be processed. */
export interface StrategyPlan {
  type: Strategy
  chunks: number
  delay_ms: number
  batches: number
  note: string | null
  estimate_seconds: number | null
}

export interface RateLimit {
  allowed: boolean
  /** Seconds; 0: now; null: never. */
  retry_after: number | null
  reason: 'window_full' | 'exceeds_limit' | null
}

/** Usage of one user, day (UTC), model and service tier. */
export interface Usage {
  user_id: string | number | null
  day: string
  model: string
  service_tier: string
  images: number
  requests: number
  input_tokens: number
  cached_tokens: number
  cache_write_tokens: number
  output_tokens: number
  reasoning_tokens: number
  /** Dollars; null: unknown, because the model has no price. Never show it as 0. */
  cost: number | null
}

interface Told<Id> {
  job_id: string
  /** Missing on older servers. */
  status?: JobStatus
  completed: number
  failed: number
  image_count: number
  /** The images whose rows have changed; null: too many to list. Missing: an older server. */
  asset_ids?: Id[] | null
  /** Whether there are too many to list. */
  many?: boolean
  /** The id of the message, added by Realtime. */
  id?: string
}

/** Payload of `job-progress`: at most one a second for each upload. */
export interface JobProgress<Id = string | number> extends Told<Id> {
  progress: number
  eta: string | null
}

/** Payload of `job-complete`: the upload has ended. */
export type JobComplete<Id = string | number> = Told<Id>

/** Payload of `batch-complete`: an OpenAI Batch has ended, and its rows are stored. */
export interface BatchComplete {
  batch_id: string | null
  job_id: string
  image_count: number
  /** OpenAI's: `completed`, `failed`, `expired` or `cancelled`. */
  status: string
  id?: string
}

/**
 * Whether messages arrive. `connecting`: not yet, or no longer; the package tries again. `refused`: the user is not a member.
 * `signed-out`: there is no user.
 */
export type LiveStatus = 'connecting' | 'live' | 'offline' | 'refused' | 'signed-out'

/** The callbacks of a part of the page. */
export interface Listener<Id = string | number> {
  onProgress?(job: JobProgress<Id>): void
  onBatchComplete?(batch: BatchComplete): void
  onJobComplete?(job: JobComplete<Id>): void
  /** Rows have changed: these, or (null) too many to list. `jobId`: the upload, if it is known. */
  onChange?(assetIds: Id[] | null, jobId: string | null): unknown
  /** Messages may have been missed: fetch what you show. Also called when the first subscription is complete. */
  onSync?(): unknown
  /** This page has enqueued images; their rows are `queued`. `since`: when the call began (Date.now()). */
  onEnqueued?(assetIds: readonly Id[], since: number): unknown
  onStatus?(status: LiveStatus, error: AutotagErrorLike | null): void
  /** Another user has signed in, or nobody is signed in: forget what the former user saw. */
  onUserChange?(): void
}

type AutotagErrorLike = import('./errors.js').AutotagError
