import type { Database } from './database'

// No file of the server or of the browser: both use it.
export const COLUMNS = 'id, created_at, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'
export const PAGE_SIZE = 50
type Row = Database['public']['Tables']['assets']['Row']
export type Image = Pick<Row, 'id' | 'created_at' | 'tagging_stage' | 'tagging_progress' | 'tagging_eta' | 'tagging_error' | 'tags'>
